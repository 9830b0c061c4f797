"""lm-eval's own command line with our checkpoints: `python -m infmoe.eval.lm_eval --model infmoe --model_args ...`."""

import sys

from infmoe.errors import InfMoEError


def main() -> int:
    """lm-eval's exit code; a mistake of ours in one line."""
    try:
        from infmoe.eval.zero_shot import harness  # noqa: F401 - registers the model
    except ImportError:
        print("error: lm-eval is not installed: pip install 'infmoe[eval]'", file=sys.stderr)
        return 2
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except InfMoEError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
