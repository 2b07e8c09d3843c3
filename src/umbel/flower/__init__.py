"""The same methods across machines, with Flower as the transport.

    server (a Flower ServerApp)                     node (an `umbel node`, or a Flower SuperNode)
    lead.py     the whole run                       work.py    a run's clients: data, model, what they keep
    fleet.py    a round, one exchange each          node.py    a long-lived SuperNode in one process
    attendance.py  who is there;  roster.py         kept.py    private states on the node's own disk
    letters.py  what is sent;  answers.py  what comes back, checked
    exchange.py, post.py    questions and answers
    both:  wire.py  states as bytes, checked before they are used;  fingerprint.py  whether both have one base
    trial.py    folders, keys and processes of a deployment;  leash.py    which end with whoever started them

Nothing here is a method, and no method knows of it: send, client_update, server_update, settle and personalize
are those that the rounds on one machine call.
"""
