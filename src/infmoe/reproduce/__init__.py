"""The paper's tables and figures, trained anew at any scale, with the controls that it left out.

`plan` says what there is to train, `store` what is there, `work` trains and measures what is missing, and `page` turns
results into a page with its tables and pictures. Nothing there is typed by hand: every figure comes from a run's own
file.
"""
