"""The same methods across machines, with Flower as the transport.

    server (a Flower ServerApp)                     node (an `umbel node`, or a Flower SuperNode)
    lead.py     the rounds, one exchange each       work.py    a run's clients: data, model, what they keep
    post.py     questions and answers               node.py    a long-lived SuperNode in one process
                                                    kept.py    private states on the node's own disk
    both:  wire.py  states as bytes, checked before they are used;  fingerprint.py  whether both have one base
    trial.py    folders, certificates, keys and processes of a deployment

Nothing here is a method, and no method knows of it: send, client_update, server_update, settle and personalize
are those that the rounds on one machine call.
"""
