"""Who is served next, and which adapter goes: one small policy a file, all tested on a simulated backend."""
