"""`prift-inspect stats`."""

import json

from inspection import stats


def test_the_numbers_in_words_and_as_json(store, data_file, call_verb):
    folder = store("s", [data_file("a", 5)])
    text = call_verb(stats, folder)
    assert "5 rows, 15 targets in 25 tokens, 2 shards" in text
    assert "prift" not in text
    numbers = json.loads(call_verb(stats, folder, "--json"))
    assert (numbers["num_rows"], numbers["num_targets"]) == (5, 15)
    assert numbers["rules"]["sft"]["kept_share"] == 1
    assert numbers["rules"]["mass"]["parameters"] == {"threshold": 0.5}
    assert numbers["kept_by_mass"][0] == 15
    assert sum(numbers["histograms"]["u"]["counts"]) == 15
    assert sum(token["num_targets"] for token in numbers["tokens"]) == 15
