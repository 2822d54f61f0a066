"""Small questions of HotpotQA's format for sentence encoders."""

import json
import random

WORDS = [
    "river",
    "ran",
    "under",
    "old",
    "bridge",
    "town",
    "built",
    "stone",
    "year",
    "king",
    "wrote",
    "book",
    "film",
    "band",
    "song",
    "tower",
]


def questions(count, seed=0):
    """Each over two of its four paragraphs of three sentences; the next question's gold paragraph is a distractor."""
    rng = random.Random(seed)
    found = []
    for number in range(count):
        titles = [f"Gold {number} a", f"Gold {number} b", f"Other {number} a", f"Other {number} b"]
        context = [
            [title, [f" {' '.join(rng.choices(WORDS, k=4))} {rng.randrange(99)}." for _ in range(3)]]
            for title in titles
        ]
        context.append([f"Gold {(number + 1) % count} a", [" foreign one.", " foreign two.", " foreign three."]])
        facts = [[titles[0], 0], [titles[1], 2]]
        asked = f"Which {rng.choice(WORDS)} of Gold {number} a has a {rng.choice(WORDS)}?"
        found.append(
            {"_id": f"q{number}", "question": asked, "answer": "stone", "supporting_facts": facts, "context": context}
        )
    return found


def written(path, count=40):
    """The arguments of a data module that reads them from a file."""
    path.write_text(json.dumps(questions(count)))
    return {"source": str(path), "sha256": None}
