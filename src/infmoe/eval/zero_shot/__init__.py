"""Zero-shot accuracy through lm-eval: the paper's seven tasks, from the Hub or from local files.

`tasks` says what each column means, `local` reads files, `scoring` computes log-likelihoods, `harness` is the model
that lm-eval sees, `items` reads lm-eval's answer, `figures` sums it up, `run` evaluates a checkpoint over its dials,
`show` draws. Needs the `eval` extra.
"""
