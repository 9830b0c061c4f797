"""What the paper reports (arXiv 2601.17680): its tables, to stand beside ours."""

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
# arm -> mean accuracy of the seven tasks after 100B tokens
TABLE5 = {"moe": 0.407, "infinity": 0.412}
# arm -> "PPL", which is a cross-entropy in nats
TABLE6 = {"moe16": 3.294, "infinity": 3.238}
FIGURE2_K = (1, 2, 3, 4, 8)
FIGURE4_SPEEDUP = 1.25
