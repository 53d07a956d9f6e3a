"""The demo's task: from the spelling of an English word to its phonemes, learnt from the CMU pronouncing dictionary.

``words`` reads and splits the data, ``score`` measures, ``job`` runs it all.
"""
