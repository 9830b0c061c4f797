"""What the paper reports (arXiv 2601.17680): its tables, to stand beside ours."""

# our scale -> the paper's model that it is set beside; all but Table 1 the paper has of the small one alone
SIZES = {"tiny": "small", "small": "small", "medium": "medium"}
TABLE1_TASKS = ("BoolQ", "HellaSwag", "WinoGrande", "ARC-e", "ARC-c", "OBQA", "RACE-high")
# scale -> arm -> (active / total parameters, accuracies in percent, their mean)
TABLE1: dict[str, dict[str, tuple[str, tuple[float, ...], float]]] = {
    "small": {
        "dense": ("124M/124M", (60.1, 29.2, 50.8, 43.1, 19.4, 15.2, 51.3), 38.5),
        "switch": ("124M/181M", (60.1, 29.2, 51.2, 43.1, 18.0, 14.4, 51.3), 38.2),
        "moe": ("124M/181M", (60.5, 29.5, 51.5, 44.6, 18.5, 15.8, 51.3), 38.8),
        "infinity": ("129M/186M", (59.6, 29.8, 54.2, 46.0, 18.9, 17.6, 52.3), 39.8),
    },
    "medium": {
        "dense": ("350M/350M", (60.7, 31.4, 48.8, 47.1, 20.1, 17.6, 53.1), 39.8),
        "switch": ("350M/556M", (58.4, 31.5, 50.0, 48.0, 20.0, 16.2, 55.2), 39.9),
        "moe": ("350M/556M", (59.3, 32.7, 50.7, 48.3, 20.6, 17.8, 52.7), 40.3),
        "infinity": ("362M/568M", (56.6, 33.7, 51.6, 49.7, 21.5, 18.8, 57.0), 41.3),
    },
}
# d_z -> "PPL", which is a cross-entropy in nats
TABLE2 = {32: 3.244, 64: 3.220, 128: 3.213, 256: 3.219}
# training step -> normalised routing entropy
TABLE3 = {5_000: 0.966, 10_000: 0.902, 15_000: 0.893, 20_000: 0.893}
# arm -> (accuracies in percent after 100B tokens, their mean); the tasks are Table 1's
TABLE5: dict[str, tuple[tuple[float, ...], float]] = {
    "moe": ((59.2, 33.4, 51.1, 48.5, 19.8, 19.0, 53.4), 40.7),
    "infinity": ((60.5, 33.5, 51.0, 49.0, 20.6, 17.0, 56.7), 41.2),
}
# arm -> "PPL", which is a cross-entropy in nats
TABLE6 = {"moe16": 3.294, "infinity": 3.238}
# What others print of GPT-2 small: nats on FineWeb after 10.26B tokens, dense, with the paper's batch, learning rate
# and warm-up (llm.c, as modded-nanogpt's record of 2024-10-13 logs it); accuracy on RACE in percent (ReMoE, 2412.14711)
DENSE_ON_FINEWEB = 3.272
RACE_OF_OTHERS = (28, 29)
FIGURE2_K = (1, 2, 3, 4, 8)
# tokens -> arm -> HellaSwag accuracy in percent: Figure 3 draws it, Tables 1 and 5 print its ends
FIGURE3 = {
    tokens: {arm: accuracies[arm][TABLE1_TASKS.index("HellaSwag")] for arm in ("moe", "infinity")}
    for tokens, accuracies in (
        (10**10, {arm: row[1] for arm, row in TABLE1["small"].items()}),
        (10**11, {arm: row[0] for arm, row in TABLE5.items()}),
    )
}
FIGURE4_SPEEDUP = 1.25


def of_small(scale: str) -> bool:
    """Whether what the paper has of its small model alone may stand beside a scale."""
    return SIZES[scale] == "small"


def none_at_this_size(scale: str, part: str) -> str:
    """Says that a table or figure is of the small model alone, where that is not what a scale is set beside."""
    return "" if of_small(scale) else f"The paper has none at this size: its {part} is of the small model alone."
