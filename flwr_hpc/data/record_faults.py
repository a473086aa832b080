"""What may be wrong with one record. Standard library only."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from flwr_hpc.config.schema import DataConfig
from flwr_hpc.config.validate import SEQ2SEQ, SPAN_CORRUPTION
from flwr_hpc.errors import closest


def record_fault(data: DataConfig, line: str) -> str | None:
    """Say what is wrong with one line of a jsonl file, None if nothing is."""
    try:
        record: Any = json.loads(line)
    except json.JSONDecodeError as exc:
        return f"not valid JSON: {exc.msg} at column {exc.colno}. Each line holds one record"
    except RecursionError:
        return "not a record: lists or objects are nested too deeply"
    except ValueError:  # Python reads no integer of more than 4300 digits
        return "not a record: a number has thousands of digits. Write it as a string"
    if "\\ud" in line.lower() and _has_lone_surrogate(record):
        return "a string holds half of a surrogate pair (\\ud800 to \\udfff), which is no text"
    if not isinstance(record, dict):
        return f"a record must be an object like {{...}}, found {_type(record)}"
    keys = columns(data, [key for key, value in record.items() if value is not None])
    if isinstance(keys, str):
        return keys
    for key in keys:
        if key == data.messages_key:
            return messages_fault(data, record[key])
        if not isinstance(record[key], str):
            return f"'{key}' must be a string, found {_type(record[key])}"
    return None


def _has_lone_surrogate(record: Any) -> bool:
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def columns(data: DataConfig, present: Sequence[str]) -> tuple[str, ...] | str:
    """Return the columns that make an example, or say what is missing."""
    pair = (data.prompt_key, data.completion_key)
    found: tuple[str, ...] = ()
    if all(key in present for key in pair):
        found = pair
    elif data.messages_key in present:
        found = (data.messages_key,)
    elif data.text_key in present:
        found = (data.text_key,)
    if found:
        return _objective_fault(data, found) or found
    missing = [key for key in pair if key not in present]
    if len(missing) == 1:
        hint = closest(missing[0], present)
        return f"'{missing[0]}' is missing beside the other one of {pair}.{hint}"
    return (
        f"needs '{data.text_key}', or '{pair[0]}' and '{pair[1]}', or '{data.messages_key}'; found "
        f"{', '.join(repr(key) for key in present) or 'nothing'}.{closest(data.text_key, present)} "
        "Name others by data.text_key, data.prompt_key and data.completion_key, or "
        "data.messages_key"
    )


def _objective_fault(data: DataConfig, keys: tuple[str, ...]) -> str | None:
    """Say why an objective does not learn from these columns, None if it does."""
    pair, text = (data.prompt_key, data.completion_key), (data.text_key,)
    found = " and ".join(map(repr, keys))
    if data.objective == SEQ2SEQ and keys != pair:
        return (
            f"data.objective={SEQ2SEQ} takes records of '{pair[0]}' and '{pair[1]}', found "
            f"{found}. Name other columns by data.prompt_key and data.completion_key; texts are "
            f"for data.objective={SPAN_CORRUPTION}"
        )
    if data.objective == SPAN_CORRUPTION and keys != text:
        return (
            f"data.objective={SPAN_CORRUPTION} takes documents, found {found}. Give records of "
            f"'{text[0]}' alone, or for a prompt and a completion data.objective={SEQ2SEQ}"
        )
    return None


def messages_fault(data: DataConfig, messages: Any) -> str | None:
    """Say what is wrong with a conversation, None if nothing is."""
    form = f"'{data.messages_key}' must be a list of objects with 'role' and 'content'"
    if not isinstance(messages, list):
        return f"{form}, found {_type(messages)}"
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            return f"{form}; message {number} is {_type(message)}"
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                found = _type(message[key]) if key in message else "none"
                return f"'{key}' of message {number} must be a string, found {found}"
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        found = ", ".join(roles) or "no message"
        return f"no message has the role 'assistant', whose words are learnt; found {found}"
    return None


def _type(value: Any) -> str:
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string"}
    names |= {list: "a list", dict: "an object", type(None): "null"}
    return names[type(value)]
