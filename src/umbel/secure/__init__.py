"""Secure aggregation: the server learns the sum of the clients' contributions and no single one."""
