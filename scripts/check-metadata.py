"""Checks licences, sources and banned crates of `cargo metadata` (standard input) against deny.toml (first argument).

A stand-in for cargo-deny where that is not installed; it understands the part of deny.toml that this project uses.
"""

import json
import re
import sys
import tomllib


def allowed(expression: str, licences: set[str]) -> bool:
    """Whether an SPDX expression can be satisfied by the allowed licences."""
    tokens = re.findall(r"\(|\)|[^\s()]+", expression.replace("/", " OR "))
    words: list[str] = []
    for token in tokens:
        if words and words[-1].endswith(" WITH"):
            words[-1] += " " + token
        elif token == "WITH":
            words[-1] += " WITH"
        else:
            words.append(token)
    python = {"AND": "and", "OR": "or", "(": "(", ")": ")"}
    source = " ".join(python.get(word, str(word in licences)) for word in words)
    return bool(eval(source, {"__builtins__": {}}))  # noqa: S307 - only True, False, and, or and parentheses


def main() -> int:
    with open(sys.argv[1], "rb") as file:
        rules = tomllib.load(file)
    licences = set(rules["licenses"]["allow"])
    banned = {ban["crate"]: set(ban.get("wrappers", [])) for ban in rules["bans"]["deny"] if ":" not in ban["crate"]}
    problems = []
    metadata = json.load(sys.stdin)
    packages = metadata["packages"]
    names = {package["id"]: package["name"] for package in packages}
    using: dict[str, list[str]] = {}
    for node in metadata["resolve"]["nodes"]:
        for dependency in node["deps"]:
            using.setdefault(dependency["pkg"], []).append(names[node["id"]])
    for package in packages:
        name = f"{package['name']} {package['version']}"
        # A banned crate is tolerated below those that deny.toml names.
        users = [user for user in using.get(package["id"], []) if user not in banned.get(package["name"], {user})]
        for user in users:
            problems.append(f"{name}: used by {user}, and banned by deny.toml")
        if package["source"] and not package["source"].startswith("registry+"):
            problems.append(f"{name}: comes from {package['source']}, not from the registry")
        if not package.get("license"):
            problems.append(f"{name}: names no licence")
        elif not allowed(package["license"], licences):
            problems.append(f"{name}: licence {package['license']} is not allowed")
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"licences, sources and bans of {len(packages)} packages: {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
