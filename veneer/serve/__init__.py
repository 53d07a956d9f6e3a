"""One base in memory, any number of adapters beside it: requests for different adapters run in one batch.

`engine` computes, `scheduler` and ``policies`` decide what, `service` runs both in a thread, ``api`` speaks HTTP.
"""
