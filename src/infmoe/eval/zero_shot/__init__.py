"""Zero-shot accuracy through lm-eval: the paper's seven tasks, from the Hub or from local files.

`tasks` says what each column means, `local` reads files, `scoring` computes log-likelihoods, `harness` is the model
that lm-eval sees, `run` evaluates a checkpoint over its dials. Needs the `eval` extra.
"""
