"""Holds discovery payloads, one a line on standard input, against the schema beside this file."""

import json
import pathlib
import sys

import jsonschema_rs

schema = json.loads((pathlib.Path(__file__).parent / "discovery.schema.json").read_text())
validator = jsonschema_rs.validator_for(schema)
payloads = [json.loads(line) for line in sys.stdin]
for payload in payloads:
    for error in validator.iter_errors(payload):
        sys.exit(f"{error}\n{json.dumps(payload, indent=2)}")
# The schema can refuse: what Home Assistant does not know, and options beside a state class.
for change in ({"state_topics": "a"}, {"options": ["a"], "state_class": "measurement", "device_class": "enum"}):
    assert not validator.is_valid(payloads[0] | change), change
print(f"{len(payloads)} payloads are as Home Assistant documents them")
