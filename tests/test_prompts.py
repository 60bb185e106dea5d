"""Reading conversations and prompts: every accepted form, every refusal with its file and line."""

import datetime
import gzip
import json
import os
import re
import sys
import types

import pytest

from robust_mo.data import prompts
from robust_mo.errors import InputError

QUESTION = {"role": "user", "content": "Why?"}
ANSWER = {"role": "assistant", "content": "Because."}


@pytest.fixture
def write(tmp_path):
    """Writes a file of these lines (objects or text) and returns its path."""

    def write(*lines, name="data.jsonl"):
        path = tmp_path / name
        path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
        return path

    return write


class TestAlpacaUserTurn:
    def test_has_the_input_below_the_instruction(self):
        assert prompts.alpaca_user_turn("Add them.", "2 and 3") == "Add them.\n\nInput: 2 and 3."

    @pytest.mark.parametrize("nothing", ["", " \n", "<noinput>", " <noinput> "])
    def test_leaves_out_an_empty_input(self, nothing):
        assert prompts.alpaca_user_turn("Tell a joke.", nothing) == "Tell a joke."


class TestReadJsonl:
    def test_numbers_the_lines_of_the_file(self, write):
        path = write({"a": 1}, "", "   ", {"b": "é\u2028\x85"}, '  {"c": null}  ')
        assert list(prompts.read_jsonl(path)) == [(1, {"a": 1}), (4, {"b": "é\u2028\x85"}), (5, {"c": None})]
        assert list(prompts.read_jsonl(str(path)))[0] == (1, {"a": 1})

    @pytest.mark.parametrize("name", ["data.jsonl", "data.jsonl.gz"])
    def test_reads_what_editors_and_compressors_write(self, tmp_path, name):
        raw = '\ufeff{"a": "日本語 \u2028 🙂"}\r\n\r\n{"b": 2}'.encode()
        (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
        assert list(prompts.read_jsonl(tmp_path / name)) == [(1, {"a": "日本語 \u2028 🙂"}), (3, {"b": 2})]

    @pytest.mark.parametrize(
        "lines, complaint",
        [
            (['{"a": 1}', '{"a": '], r"data.jsonl:2 is not JSON \(Expecting value, column 6\)"),
            (["{'a': 1}"], "data.jsonl:1 is not JSON"),
            (['{"a": 1} {"a": 2}'], "data.jsonl:1 is not JSON"),
            (["", "[1, 2]"], r"data.jsonl:2 is not a JSON object but '\[1, 2\]'"),
            (["null"], "data.jsonl:1 is not a JSON object"),
            ([], "data.jsonl is empty"),
            (["", "  "], "data.jsonl is empty"),
        ],
    )
    def test_names_file_and_line(self, write, lines, complaint):
        path = write(*lines)
        with pytest.raises(InputError, match=f"^{re.escape(str(path.parent))}/{complaint}"):
            list(prompts.read_jsonl(path))

    def test_missing_file(self, tmp_path):
        for path in (tmp_path / "nothing.jsonl", tmp_path / "nothing.jsonl.gz", tmp_path):
            with pytest.raises(InputError, match=f"there is no file {re.escape(str(path))}; give a JSONL file"):
                list(prompts.read_jsonl(path))

    def test_other_encodings(self, tmp_path):
        path = tmp_path / "data.jsonl"
        path.write_bytes(b'{"a": 1}\n{"a": "caf\xe9"}\n')
        with pytest.raises(InputError, match="data.jsonl:2 is not UTF-8"):
            list(prompts.read_jsonl(path))

    @pytest.mark.parametrize("damage", [lambda raw: raw[:-20], lambda raw: b'{"a": 1}', lambda raw: raw[:40] + raw])
    def test_damaged_compression(self, tmp_path, damage):
        path = tmp_path / "data.jsonl.gz"
        path.write_bytes(damage(gzip.compress(os.urandom(300).hex().encode())))
        with pytest.raises(InputError, match="data.jsonl.gz is damaged after line 0"):
            list(prompts.read_jsonl(path))


class TestReadConversations:
    def test_messages(self, write):
        system = {"role": "system", "content": "Be brief."}
        path = write({"messages": [QUESTION, ANSWER]}, {"messages": [system, QUESTION, ANSWER], "source": "me"})
        assert prompts.read_conversations(path) == [[QUESTION, ANSWER], [system, QUESTION, ANSWER]]

    def test_alpaca(self, write):
        path = write(
            {"instruction": "Why?", "input": "", "output": "Because."},
            {"instruction": "Why?", "output": "Because."},
            {"instruction": "Why?", "input": None, "output": "Because.", "text": "..."},
            {"instruction": "Add them.", "input": "2 and 3", "output": " 5\n"},
        )
        added = [
            {"role": "user", "content": "Add them.\n\nInput: 2 and 3."},
            {"role": "assistant", "content": " 5\n"},
        ]
        assert prompts.read_conversations(path) == [[QUESTION, ANSWER]] * 3 + [added]

    @pytest.mark.parametrize("name, count", [("alpaca_subset", 3407), ("alpacaeval805_llama31_8b", 805)])
    def test_real_files(self, shared_data, name, count):
        conversations = prompts.read_conversations(shared_data / f"{name}.jsonl")
        assert len(conversations) == count
        assert {tuple(message["role"] for message in messages) for messages in conversations} == {("user", "assistant")}

    @pytest.mark.parametrize(
        "line, complaint",
        [
            (
                {"question": "Why?", "answer": "No."},
                r"the fields are 'question', 'answer'; accepted are \{\"messages\"",
            ),
            ({}, "the fields are none; accepted are"),
            ({"instruction": "Why?"}, r"the fields are 'instruction'; accepted are \{\"messages\""),
            ({"instruction": "Why?", "input": 3, "output": "x"}, "'input' must be a string, not 3"),
            ({"instruction": "Why?", "output": None}, "'output' must be a string, not None"),
            ({"messages": []}, "messages must be a list of at least one message"),
            ({"messages": [QUESTION, {"role": "bot", "content": "x"}]}, "message 2 has the role 'bot'"),
            ({"messages": [QUESTION]}, "no assistant message to learn from"),
            ('{"messages": [{"role": "user", "content": "\\ud83d"}]}', "half a surrogate pair"),
        ],
    )
    def test_names_the_line_that_is_none(self, write, line, complaint):
        path = write({"messages": [QUESTION, ANSWER]}, line)
        with pytest.raises(InputError, match=f"^{re.escape(str(path))}:2: .*{complaint}"):
            prompts.read_conversations(path)


class TestHub:
    @pytest.fixture(autouse=True)
    def loaded_anew(self):
        prompts._hub_rows.cache_clear()
        yield
        prompts._hub_rows.cache_clear()

    @pytest.fixture
    def asked(self, monkeypatch):
        """Puts a fake in the place of `datasets`; what it was asked for ends up in the list."""
        asked = []

        def load_dataset(*names, split):
            asked.append((*names, split))
            return [
                {"messages": [QUESTION, ANSWER]},
                {"instruction": "Why?", "input": None, "output": "Because."},
            ]

        monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
        prompts._hub_rows.cache_clear()
        yield asked
        prompts._hub_rows.cache_clear()

    @pytest.mark.parametrize(
        "source, expected",
        [
            ("hub:tatsu-lab/alpaca:train", ("tatsu-lab/alpaca", "train")),
            ("hub:some/set:small:train", ("some/set", "small", "train")),
            ("hub:alpaca:train[:10%]+test[5:9]", ("alpaca", "train[:10%]+test[5:9]")),
            ("hub:alpaca:small:train[:10]", ("alpaca", "small", "train[:10]")),
        ],
    )
    def test_names(self, asked, source, expected):
        for _ in range(2):
            assert prompts.read_conversations(source) == [[QUESTION, ANSWER]] * 2
        assert asked == [expected], "loaded once in a process"

    @pytest.mark.parametrize("source", ["hub:", "hub:name", "hub:name:", "hub::train", "hub:a:b:c:d"])
    def test_names_of_nothing(self, asked, source):
        with pytest.raises(InputError, match=f"'{source}' names no data set; write hub:NAME:SPLIT"):
            prompts.read_conversations(source)
        assert not asked

    def test_names_the_row_that_is_none(self, monkeypatch):
        rows = [{"messages": [QUESTION, ANSWER]}, {"text": "x"}]
        fake = types.SimpleNamespace(load_dataset=lambda name, split: rows)
        monkeypatch.setitem(sys.modules, "datasets", fake)
        with pytest.raises(InputError, match="^hub:name:train row 2: the fields are 'text'; accepted are"):
            prompts.read_conversations("hub:name:train")

    def test_keeps_of_messages_what_a_file_can_hold(self, monkeypatch):
        rows = [{"messages": [QUESTION | {"at": datetime.datetime.now()}, ANSWER]}]
        monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=lambda name, split: rows))
        assert prompts.read_conversations("hub:name:train") == [[QUESTION, ANSWER]]

    def test_problems_of_an_empty_split(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=lambda name, split: []))
        with pytest.raises(InputError, match=r"hub:name:test\[500:\] holds no problem: give another split"):
            prompts.read_problems("hub:name:test[500:]")

    def test_failure_is_one_line(self, monkeypatch):
        def fail(*names, split):
            raise ConnectionError("Couldn't reach the Hub\nand much more\nof the same")

        monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=fail))
        with pytest.raises(InputError) as error:
            prompts.read_conversations("hub:name:train")
        assert "\n" not in str(error.value)
        assert "hub:name:train cannot be loaded (Couldn't reach the Hub); check" in str(error.value)

    def test_missing_package(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(InputError, match="needs the package datasets; run `pip install datasets`"):
            prompts.read_conversations("hub:name:train")

    @pytest.mark.slow
    def test_the_real_package(self, write, tmp_path, monkeypatch):
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        (tmp_path / "set").mkdir()
        write(*[{"instruction": "Why?", "output": "Because."}] * 3, name="set/train.jsonl")
        assert prompts.read_conversations(f"hub:{tmp_path / 'set'}:train") == [[QUESTION, ANSWER]] * 3
        assert prompts.read_conversations(f"hub:{tmp_path / 'set'}:train[1:]") == [[QUESTION, ANSWER]] * 2
        with pytest.raises(InputError, match="cannot be loaded .*test"):
            prompts.read_conversations(f"hub:{tmp_path / 'set'}:test")
        with pytest.raises(InputError, match="hub:nobody/nothing:train cannot be loaded"):
            prompts.read_conversations("hub:nobody/nothing:train")


class TestReadPrompts:
    def test_forms(self, write):
        lines = [
            {"id": 7, "prompt": "Why?", "topic": "reasons"},
            {"messages": [QUESTION, ANSWER, QUESTION], "max_new_tokens": 5},
            {"prompt": "Why?", "max_new_tokens": None},
        ]
        first, second, third = prompts.read_prompts(write(*lines))
        assert (first.messages, first.max_new_tokens) == ([QUESTION], None)
        assert (second.messages, second.max_new_tokens) == ([QUESTION, ANSWER, QUESTION], 5)
        assert (third.messages, third.max_new_tokens) == ([QUESTION], None)
        assert [prompt.fields for prompt in (first, second, third)] == lines

    @pytest.mark.parametrize(
        "line, complaint",
        [
            ({"question": "Why?"}, r"the fields are 'question'; accepted are \{\"messages\".*\"prompt\""),
            ({"prompt": "Why?", "messages": [QUESTION]}, "the fields are 'prompt', 'messages'; accepted are"),
            ({"prompt": 3}, "has the content 3; it must be a string"),
            ({"messages": [QUESTION, ANSWER]}, "the last message is an assistant message"),
            ({"messages": {"role": "user"}}, "messages must be a list"),
            ({"prompt": "Why?", "max_new_tokens": 0}, "'max_new_tokens' is 0; give a whole number"),
            ({"prompt": "Why?", "max_new_tokens": "9"}, "'max_new_tokens' is '9'"),
            ({"prompt": "Why?", "max_new_tokens": True}, "'max_new_tokens' is True"),
            ({"prompt": "Why?", "max_new_tokens": 2.5}, "'max_new_tokens' is 2.5"),
        ],
    )
    def test_names_the_line_that_is_none(self, write, line, complaint):
        path = write({"prompt": "Why?"}, line)
        with pytest.raises(InputError, match=f"^{re.escape(str(path))}:2: .*{complaint}"):
            prompts.read_prompts(path)

    def test_no_prompts(self, write):
        with pytest.raises(InputError, match="data.jsonl is empty"):
            prompts.read_prompts(write())


class TestBuiltinQuestions:
    def test_parts_are_disjoint_and_complete(self):
        parts = {part: prompts.builtin_questions(part) for part in prompts.PARTS}
        for part, questions in parts.items():
            assert len(questions) >= 40
            assert all(question["part"] == part for question in questions)
            assert all(question[field].strip() for question in questions for field in ("question", "plain", "pirate"))
        texts = [question["question"].casefold() for questions in parts.values() for question in questions]
        assert len(set(texts)) == len(texts)

    def test_unknown_part(self):
        with pytest.raises(InputError, match="no built-in questions for 'green'; give one of red, blue, evaluation"):
            prompts.builtin_questions("green")


def test_problems_without_an_answer_are_left_out(tmp_path, capsys):
    """MATH's training split has two."""
    file = tmp_path / "data.jsonl"
    lines = [{"problem": f"What is {i}?", "answer": "" if i == 1 else str(i)} for i in range(4)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [gold for _, gold in prompts.read_problems(str(file))] == ["0", "2", "3"]
    assert [entry["gold"] for entry in prompts.read_questions(str(file))] == ["0", "2", "3"]
    told = capsys.readouterr().out
    assert told == f"note: {file}: 1 problems with a blank answer are left out, the first is {file}:2\n"


def test_maths_training_split_can_be_read(shared_data):
    file = next(shared_data.glob("math_train12k.jsonl*"))
    assert len(prompts.read_questions(file)) == 11998


def test_an_answer_may_be_a_number(write):
    file = str(write({"problem": "2 + 2?", "answer": 4}, {"problem": "1 / 2?", "answer": 0.5}))
    assert prompts.read_problems(file) == [("2 + 2?", "4"), ("1 / 2?", "0.5")]
    file = str(write({"problem": "a?", "answer": 1e-5}, {"problem": "b?", "answer": -1.5e16}))
    assert prompts.read_problems(file) == [("a?", "0.00001"), ("b?", "-15000000000000000")]
    write({"problem": "2 + 2?", "answer": True})
    with pytest.raises(InputError, match="data.jsonl:1 has 'answer' True: give a text; its fields are answer, problem"):
        prompts.read_problems(file)
