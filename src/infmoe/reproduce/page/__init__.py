"""The page of evidence: `report` writes it, of sections for the paper's tables, its figures, controls and elastic runs.

Nothing here trains or measures; every number comes from a finished run in the store.
"""
