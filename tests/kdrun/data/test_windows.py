from itertools import pairwise

import pytest
from torch.utils.data import DataLoader

from kdrun.data.windows import TextWindows, concatenate, window_phase
from kdrun.errors import InputError


class LetterTokenizer:
    """One token per letter; 0 ends a document."""

    eos_token_id = 0

    def __call__(self, text, **options):
        assert options["add_special_tokens"] is False
        return {"input_ids": [ord(letter) for letter in text]}


def all_tokens(windows):
    return [token for i in range(len(windows)) for token in windows[i]["input_ids"]]


def test_documents_are_joined_and_each_is_ended():
    assert concatenate(["ab", "", "c"], LetterTokenizer()) == [97, 98, 0, 0, 99, 0]


def test_a_tokenizer_without_an_end_is_refused():
    tokenizer = LetterTokenizer()
    tokenizer.eos_token_id = None
    with pytest.raises(InputError, match="end-of-text"):
        concatenate(["ab"], tokenizer)


def test_fixed_windows_cover_the_text_up_to_the_ragged_end():
    windows = TextWindows(range(23), 5, phase=False)
    assert len(windows) == 4
    assert all_tokens(windows) == list(range(20))
    windows.set_epoch(3)
    assert all_tokens(windows) == list(range(20))


@pytest.mark.parametrize("size", [9, 10, 13, 14, 50])
def test_every_epoch_has_as_many_windows_of_neighbouring_tokens(size):
    windows = TextWindows(range(size), 5, seed=2)
    for epoch in range(30):
        windows.set_epoch(epoch)
        tokens = all_tokens(windows)
        assert tokens[0] == window_phase(2, epoch, 5)
        assert len(tokens) == 5 * len(windows)
        assert all(after == before + 1 for before, after in pairwise(tokens))
    with pytest.raises(IndexError):
        windows[len(windows)]


def test_over_the_epochs_every_token_is_seen_and_every_phase_drawn():
    windows = TextWindows(range(52), 5)
    seen, phases = set(), set()
    for epoch in range(60):
        windows.set_epoch(epoch)
        seen.update(all_tokens(windows))
        phases.add(windows[0]["input_ids"][0])
    assert seen == set(range(49))  # nine windows, the last ones of them 4 .. 48
    assert phases == set(range(5))


def test_the_phase_is_decided_by_seed_and_epoch_alone():
    first, second = TextWindows(range(500), 100, seed=1), TextWindows(range(500), 100, seed=1)
    second.set_epoch(5)
    second.set_epoch(0)
    assert all_tokens(first) == all_tokens(second)
    assert window_phase(1, 0, 100) != window_phase(1, 1, 100) != window_phase(2, 0, 100)
    # Written down, so that a checkpoint of one version resumes in the next.
    assert [window_phase(0, epoch, 128) for epoch in range(3)] == [44, 37, 40]


def test_labels_are_the_inputs_and_not_the_same_list():
    window = TextWindows(range(10), 5, phase=False)[1]
    assert window == {"input_ids": [5, 6, 7, 8, 9], "labels": [5, 6, 7, 8, 9]}
    window["labels"][0] = -100
    assert window["input_ids"][0] == 5


def test_a_loader_reads_all_windows():
    windows = TextWindows(range(40), 5, phase=False)
    loader = DataLoader(windows, batch_size=3, collate_fn=list)
    assert [len(batch) for batch in loader] == [3, 3, 2]


@pytest.mark.parametrize(("size", "phase"), [(8, True), (4, False), (0, False)])
def test_a_text_without_one_window_is_refused(size, phase):
    with pytest.raises(ValueError, match=f"{size} tokens"):
        TextWindows(range(size), 5, phase=phase)


def test_a_window_of_one_token_is_refused():
    with pytest.raises(ValueError, match="at least 2"):
        TextWindows(range(8), 1)
