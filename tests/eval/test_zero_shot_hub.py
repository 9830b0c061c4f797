"""lm-eval's own tasks as the Hub would give them: prompts, answers and labels, written by hand."""

import dataclasses
import json

import pytest

pytest.importorskip("lm_eval", reason="the `eval` extra is not installed")

from infmoe.eval.zero_shot import harness, run

# (path, configuration) on the Hub -> the split that is scored, and its items
HUB = {
    ("aps/super_glue", "boolq"): (
        "validation",
        [
            {"question": "do cats purr", "passage": "Cats purr. Dogs bark.", "idx": 0, "label": 1},
            {"question": "is ice hot", "passage": "Ice is frozen water.", "idx": 1, "label": 0},
        ],
    ),
    ("Rowan/hellaswag", None): (
        "validation",
        [
            {
                "ind": 24,
                "activity_label": "Baking bread",
                "ctx_a": "A man mixes flour [title] and water.",
                "ctx_b": "he",
                "ctx": "A man mixes flour [title] and water. he",
                "endings": ["kneads it. [step] He rests.", "sleeps.", "swims away.", "flies."],
                "source_id": "wikihow~0",
                "split": "val",
                "split_type": "indomain",
                "label": "0",
            },
            {
                "ind": 25,
                "activity_label": "Skiing",
                "ctx_a": "A woman stands on a hill.",
                "ctx_b": "SHE then",
                "ctx": "A woman stands on a hill. SHE then",
                "endings": ["melts.", "cooks.", "skis down.", "sings."],
                "source_id": "activitynet~1",
                "split": "val",
                "split_type": "zeroshot",
                "label": "2",
            },
        ],
    ),
    ("allenai/winogrande", "winogrande_xl"): (
        "validation",
        [
            {"sentence": "The cup fell off the shelf as the _ was wet.", "option1": "cup", "option2": "shelf"}
            | {"answer": "2"},
            {"sentence": "Ann thanked Eve because _ was helped.", "option1": "Ann", "option2": "Eve", "answer": "1"},
        ],
    ),
    ("allenai/ai2_arc", "ARC-Easy"): (
        "test",
        [
            {"id": "M1", "question": "What melts?", "answerKey": "C"}
            | {"choices": {"text": ["iron bars", "air", "ice", "light"], "label": ["A", "B", "C", "D"]}},
            {"id": "M2", "question": "What is wet?", "answerKey": "2"}
            | {"choices": {"text": ["sand", "water", "fire"], "label": ["1", "2", "3"]}},
        ],
    ),
    ("allenai/ai2_arc", "ARC-Challenge"): (
        "test",
        [
            {"id": "M3", "question": "Which is a force?", "answerKey": "E"}
            | {"choices": {"text": ["a", "b", "c", "d", "gravity"], "label": ["A", "B", "C", "D", "E"]}},
        ],
    ),
    ("allenai/openbookqa", "main"): (
        "test",
        [
            {"id": "8-343", "question_stem": "A stove is used to", "answerKey": "B"}
            | {"choices": {"text": ["freeze", "cook food", "fly", "read"], "label": ["A", "B", "C", "D"]}},
        ],
    ),
    ("EleutherAI/race", "high"): (
        "test",
        [
            {
                "article": "Tom has a red hat.",
                "problems": str(
                    [
                        {"question": "Who has a hat?", "answer": "B", "options": ["Ann", "Tom", "Eve", "Bob"]},
                        {"question": "The hat is  _  .", "answer": "C", "options": ["old", "big", "red", "wet"]},
                        {"question": "What is red?", "answer": "D", "options": ["Tom", "Ann", "tea", "a hat"]},
                    ]
                ),
            },
        ],
    ),
}

TEXTS = ("passage", "activity_label", "sentence", "question", "question_stem", "article")

# column -> (contexts, continuations) of every answer, and the label, of each item
EXPECTED = {
    "BoolQ": [
        ([("Cats purr. Dogs bark.\nQuestion: do cats purr?\nAnswer:", answer) for answer in (" no", " yes")], 1),
        ([("Ice is frozen water.\nQuestion: is ice hot?\nAnswer:", answer) for answer in (" no", " yes")], 0),
    ],
    "HellaSwag": [
        (
            [
                ("Baking bread: A man mixes flour. and water. He", answer)
                for answer in (" kneads it. He rests.", " sleeps.", " swims away.", " flies.")
            ],
            0,
        ),
        (
            [
                ("Skiing: A woman stands on a hill. She then", answer)
                for answer in (" melts.", " cooks.", " skis down.", " sings.")
            ],
            2,
        ),
    ],
    "WinoGrande": [
        ([(f"The cup fell off the shelf as the {name}", " was wet.") for name in ("cup", "shelf")], 1),
        ([(f"Ann thanked Eve because {name}", " was helped.") for name in ("Ann", "Eve")], 0),
    ],
    "ARC-e": [
        ([("Question: What melts?\nAnswer:", answer) for answer in (" iron bars", " air", " ice", " light")], 2),
        ([("Question: What is wet?\nAnswer:", answer) for answer in (" sand", " water", " fire")], 1),
    ],
    "ARC-c": [
        ([("Question: Which is a force?\nAnswer:", answer) for answer in (" a", " b", " c", " d", " gravity")], 4)
    ],
    "OBQA": [([("A stove is used to", answer) for answer in (" freeze", " cook food", " fly", " read")], 1)],
    "RACE-high": [
        (
            [
                (
                    "Article: Tom has a red hat.\n\n"
                    "Question: Who has a hat?\nAnswer: Tom\nThe hat is red\nWhat is red?",
                    answer,
                )
                for answer in (" Tom", " Ann", " tea", " a hat")
            ],
            3,
        )
    ],
}


@pytest.fixture
def hub(monkeypatch):
    """The Hub's data sets, in memory: what is asked for by another name is not there."""
    import datasets

    def load_dataset(path, name=None, **rest):
        if (path, name) not in HUB:
            raise ConnectionError(f"no {path}, {name}")
        split, docs = HUB[path, name]
        # other splits are there too, and hold something else: no item of theirs may be scored
        other = [{key: f"zz {value}" if key in TEXTS else value for key, value in docs[-1].items()}]
        others = {s: datasets.Dataset.from_list(other) for s in ("train", "validation", "test") if s != split}
        return datasets.DatasetDict({split: datasets.Dataset.from_list(docs), **others})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def test_the_papers_tasks_are_asked_as_lm_eval_asks_them(hub, tiny_run, tmp_path, monkeypatch):
    asked = {}
    original = harness.InfMoELM.loglikelihood

    def record(self, requests, **rest):
        for instance in requests:
            asked.setdefault(instance.task_name, {}).setdefault(instance.doc_id, []).append(instance.args)
        return original(self, requests, **rest)

    monkeypatch.setattr(harness.InfMoELM, "loglikelihood", record)
    settings = run.Settings("paper", per_item=tmp_path / "items.jsonl")
    result = run.evaluate_tasks(tiny_run.run, settings)
    (point,) = result["points"]
    assert list(point["tasks"]) == list(EXPECTED)
    assert all(figures["source"] == "the Hub" for figures in point["tasks"].values())
    items = [json.loads(line) for line in (tmp_path / "items.jsonl").read_text().splitlines()]
    for name, expected in EXPECTED.items():
        figures = point["tasks"][name]
        assert figures["items"] == len(expected)
        by_item = asked[figures["task"]]
        mine = [item for item in items if item["task"] == name]
        assert [item["item"] for item in mine] == list(range(len(expected)))
        for number, ((pairs, gold), item) in enumerate(zip(expected, mine, strict=True)):
            assert by_item[number] == pairs, name
            assert item["gold"] == gold, name
            assert item["num_chars"] == [len(continuation) - 1 for _, continuation in pairs], name
            assert len(item["log_likelihoods"]) == len(pairs)
        hits = [max(item["log_likelihoods"]) == item["log_likelihoods"][item["gold"]] for item in mine]
        assert figures["acc"] == sum(hits) / len(hits)


def test_repeats_and_versions_of_the_hubs_tasks_are_told(hub, tiny_run, monkeypatch):
    from infmoe.eval.zero_shot import show
    from infmoe.eval.zero_shot.tasks import ALL

    split, docs = HUB["allenai/openbookqa", "main"]
    padded = {**docs[0], "id": "9", "choices": {**docs[0]["choices"], "text": ["fly", "cook food", "fly", "read"]}}
    monkeypatch.setitem(HUB, ("allenai/openbookqa", "main"), (split, [*docs, {**docs[0], "id": "8-344"}, padded]))
    monkeypatch.setitem(ALL, "openbookqa", dataclasses.replace(ALL["openbookqa"], version=0.5))
    result = run.evaluate_tasks(tiny_run.run, run.Settings("openbookqa,boolq"))
    assert list(result["notes"]) == ["openbookqa"]
    text = show.table(result)
    assert "note: openbookqa: 1 repeated items" in text
    assert "note: openbookqa: 1 repeated answers, each scored" in text
    assert "note: openbookqa: 1.0 is the version in lm-eval" in text
    assert result["points"][0]["tasks"]["OBQA"]["version"] == 1.0
    assert result["points"][0]["tasks"]["OBQA"]["items"] == 3


def test_questions_on_one_passage_belong_together(hub, tiny_run, monkeypatch):
    split, docs = HUB["aps/super_glue", "boolq"]
    again = {"question": "do dogs bark", "passage": docs[0]["passage"], "idx": 2, "label": 1}
    monkeypatch.setitem(HUB, ("aps/super_glue", "boolq"), (split, [*docs, again]))
    split, docs = HUB["allenai/winogrande", "winogrande_xl"]
    twin = {**docs[0], "sentence": "The cup fell off the shelf as the _ was dry.", "answer": "1"}
    monkeypatch.setitem(HUB, ("allenai/winogrande", "winogrande_xl"), (split, [*docs, twin]))
    result = run.evaluate_tasks(tiny_run.run, run.Settings("boolq,winogrande,arc_easy"))
    found = {name: (t["items"], t["passages"]) for name, t in result["points"][0]["tasks"].items()}
    assert found == {"BoolQ": (3, 2), "WinoGrande": (3, 2), "ARC-e": (2, 2)}


def test_what_was_read_before_the_hub_went_is_shown(hub, tiny_run, capsys, monkeypatch):
    from infmoe.cli import main

    monkeypatch.delitem(HUB, ("allenai/winogrande", "winogrande_xl"))
    assert main(["evaluate", str(tiny_run.run), "--tasks", "paper"]) == 2
    out, err = capsys.readouterr()
    assert next(line for line in out.splitlines() if "BoolQ" in line).split() == ["BoolQ", "HellaSwag", "mean"]
    last = err.splitlines()[-1]
    assert last.startswith("error: task 'winogrande' is read from the Hugging Face Hub")
    assert "give --tasks-dir for local files" in last
