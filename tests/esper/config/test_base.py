"""YAML in, frozen models out; what is wrong is told by path, rule, value and nearest name."""

import pickle
from pathlib import Path

import pytest
from pydantic import Field, PositiveInt, ValidationError

from esper.config.base import Config, ConfigError, read_yaml, validate


class Inner(Config):
    size: PositiveInt = 1
    rate: float = 0.5
    flag: bool = False
    names: tuple[str, ...] = ()
    numbers: tuple[int, ...] = ()


class Outer(Config):
    inner: Inner = Inner()
    maybe: Inner | None = None
    many: tuple[Inner, ...] = ()
    by_name: dict[str, Inner] = Field(default_factory=dict)
    name: str = Field("a", pattern="^[a-z]+$")
    folder: Path = Path("runs")
    at_least_two: tuple[int, ...] = Field((1, 2), min_length=2)


def problem(data):
    with pytest.raises(ConfigError, match=r"^here is not valid") as caught:
        validate(Outer, data, source="here")
    (line,) = caught.value.problems
    return line


@pytest.mark.parametrize(
    ("data", "line"),
    [
        ({"iner": {}}, "iner must be a known key, but got 'iner'; did you mean 'inner'?"),
        ({"zzz": 1}, "zzz must be a known key, but got 'zzz'; known keys: inner, maybe, many, "
                     "by_name, name, folder, at_least_two."),
        ({"inner": {"siez": 1}},
         "inner.siez must be a known key, but got 'siez'; did you mean 'size'?"),
        ({"maybe": {"siez": 1}},
         "maybe.siez must be a known key, but got 'siez'; did you mean 'size'?"),
        ({"many": [{}, {"siez": 1}]},
         "many.1.siez must be a known key, but got 'siez'; did you mean 'size'?"),
        ({"by_name": {"x": {"siez": 1}}},
         "by_name.x.siez must be a known key, but got 'siez'; did you mean 'size'?"),
        ({1: 2}, "1 must be strings, but got 1."),
    ],
)  # fmt: skip
def test_an_unknown_key_is_refused_with_the_nearest(data, line):
    assert problem(data) == line


def test_a_mistake_in_python_names_the_nearest_as_well():
    with pytest.raises(ValidationError, match="got 'siez'; did you mean 'size'") as caught:
        Inner(siez=1)
    assert caught.value.title == "Inner"
    with pytest.raises(ValidationError) as caught:
        Outer(nam="b", inner={"siez": 1, "rate": "0.1"}, at_least_two=[1])
    assert {(p["loc"], p["msg"].partition(";")[0]) for p in caught.value.errors()} == {
        (("nam",), "must be a known key, but got 'nam'"),
        (("inner", "siez"), "must be a known key, but got 'siez'"),
        (("inner", "rate"), "Input should be a number without quotes"),
        (("at_least_two",), "Tuple should have at least 2 items after validation, not 1"),
    }


@pytest.mark.parametrize(
    ("data", "line"),
    [
        ({"inner": {"size": 0}}, "inner.size must be greater than 0, but got 0."),
        ({"inner": {"size": 1.5}}, "inner.size must be a valid integer, got a number with a "
                                   "fractional part, but got 1.5."),
        ({"inner": {"size": "many"}}, "inner.size must be a valid integer, unable to parse string "
                                      "as an integer, but got 'many'."),
        ({"inner": {"size": "3"}}, "inner.size must be a number without quotes, but got '3'."),
        ({"inner": {"size": True}}, "inner.size must be a number without quotes, but got True."),
        ({"inner": {"rate": "0.1"}}, "inner.rate must be a number without quotes, but got '0.1'."),
        ({"inner": {"flag": 1}}, "inner.flag must be true or false, but got 1."),
        ({"inner": {"flag": "on"}}, "inner.flag must be true or false, but got 'on'."),
        ({"inner": {"numbers": [1, "2"]}},
         "inner.numbers must be a list whose every item is a number without quotes, "
         "but got [1, '2']."),
        ({"inner": {"rate": float("inf")}}, "inner.rate must be a finite number, but got inf."),
        ({"inner": {"rate": float("nan")}}, "inner.rate must be a finite number, but got nan."),
        ({"inner": {"names": "ab"}}, "inner.names must be a valid tuple, but got 'ab'."),
        ({"inner": None}, "inner must be a valid dictionary or instance of Inner, but got None."),
        ({"name": "A1"}, "name must match pattern '^[a-z]+$', but got 'A1'."),
        ({"name": 7}, "name must be a valid string, but got 7."),
        ({"at_least_two": [1]},
         "at_least_two must have at least 2 items after validation, not 1, but got [1]."),
        ([1], "(top level) must be a valid dictionary or instance of Outer, but got [1]."),
    ],
)  # fmt: skip
def test_a_wrong_type_or_value_is_refused_with_path_and_rule(data, line):
    assert problem(data) == line


def test_every_problem_is_listed_under_the_given_path():
    data = {"inner": {"size": 0, "rate": "x"}, "nam": 1}
    with pytest.raises(ConfigError) as caught:
        validate(Outer, data, source="run.yaml", at="arms.esper")
    assert str(caught.value).startswith("run.yaml is not valid:\n  arms.esper.inner.size must be")
    assert len(caught.value.problems) == 3
    assert all(line.startswith("arms.esper.") for line in caught.value.problems)


def test_a_long_value_is_cut():
    assert problem({"inner": "x" * 200}).endswith("xxx....")
    assert len(problem({"inner": "x" * 200})) < 140


def test_the_error_survives_pickling():
    error = ConfigError("run.yaml", ("a must be b, but got c.",))
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) == "run.yaml is not valid:\n  a must be b, but got c."


def test_what_is_right_is_taken_and_frozen():
    data = {"many": [{"size": 3, "rate": 1}], "folder": "x/y", "inner": {"numbers": [1, 2]}}
    outer = validate(Outer, data, source="here")
    assert outer.many[0] == Inner(size=3, rate=1.0)
    assert outer.folder == Path("x/y")
    assert outer.inner.numbers == (1, 2)
    with pytest.raises(ValidationError, match="frozen"):
        outer.name = "b"


def read(tmp_path, text):
    file = tmp_path / "c.yaml"
    file.write_text(text, encoding="utf-8")
    return read_yaml(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2\n", r"key 'a' must be given once, but is given twice"),
        ("x:\n  - {b: 1, c: 2, b: 3}\n", r"key 'b' must be given once"),
        ("- 1\n- 2\n", r"must hold keys and values, but got \[1, 2\]"),
        ("", r"must hold keys and values, but got None"),
        ("just words\n", r"must hold keys and values, but got 'just words'"),
        ("a: [1, 2\n", r"must be YAML, but: while parsing"),
        ("a: !!python/object/apply:os.system ['true']\n", r"must be YAML, but: could not determ"),
        ("? [1]\n: 2\n", r"must be YAML, but: while constructing a mapping"),
    ],
)
def test_a_file_that_is_no_mapping_of_unique_keys_is_refused(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        read(tmp_path, text)
    assert str(caught.value).startswith(f"{tmp_path / 'c.yaml'} is not valid")


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml is not valid:.*\n.*No such file"):
        read_yaml(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match=r"must be readable, but: Is a directory"):
        read_yaml(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"a: \xff\xfe\n")
    with pytest.raises(ConfigError, match=r"must be YAML"):
        read_yaml(tmp_path / "latin.yaml")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3), ("1E5", 1e5), ("-2e+4", -2e4), ("1.5e-3", 1.5e-3), ("2.e1", 20.0),
        ("3", 3), ("0.5", 0.5), ("'1e-3'", "1e-3"), ("e3", "e3"), ("1e", "1e"), ("true", True),
    ],
)  # fmt: skip
def test_a_number_is_a_number_also_in_scientific_notation(tmp_path, text, value):
    result = read(tmp_path, f"a: {text}\n")["a"]
    assert result == value
    assert type(result) is type(value)


def test_anchors_and_merge_keys_work(tmp_path):
    text = "base: &base {a: 1, b: 2}\nother:\n  <<: *base\n  b: 3\n"
    assert read(tmp_path, text)["other"] == {"a": 1, "b": 3}
