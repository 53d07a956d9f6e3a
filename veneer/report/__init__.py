"""What a person looks at: the live panel of a run, its curves, tables of adapters and examples, the page of methods.

Each file imports what it draws with when it draws.
"""
