"""Appraises what a benchmark left in a folder with Keylime's own functions, as often as it can for a moment.

Each line on standard input names what to do; each answer is one line: how often a second.
"""

import base64
import logging
import pathlib
import struct
import sys
import time
import types

# Signatures of policies are not measured here, and the binding to GnuPG is in C.
sys.modules.setdefault("gpg", types.ModuleType("gpg"))
# It says of each boot what it has no opinion on.
logging.disable(logging.WARNING)

from keylime.common.algorithms import Hash
from keylime.ima import ima
from keylime.mba.elparsing import tpm2_tools_elparser
from keylime.tpm.tpm_main import Tpm

MOMENT = 0.25
SHA256 = 0x000B


def pcr_blob(values):
    """PCRs 0 to 14 as tpm2-tools writes them from memory: one selection of sixteen, then lists of eight digests."""
    selected = sum(1 << index for index in range(len(values)))
    blob = struct.pack("<I", 1) + struct.pack("<HB3s2x", SHA256, 3, selected.to_bytes(3, "little"))
    blob += bytes(8) * 15
    lists = [values[at : at + 8] for at in range(0, len(values), 8)]
    blob += struct.pack("<I", len(lists))
    for digests in lists:
        blob += struct.pack("<I", len(digests))
        for digest in digests + [b""] * (8 - len(digests)):
            blob += struct.pack("<H", len(digest)) + digest.ljust(64, b"\0")
    return blob


class Boot:
    """A quote and the log that explains it."""

    def __init__(self, folder):
        encoded = lambda content: base64.b64encode(content).decode()
        read = lambda name: (folder / name).read_bytes()
        values = [bytes.fromhex(line) for line in read("pcrs").decode().split()]
        ak = read("ak")
        self.ak = encoded(struct.pack(">H", len(ak)) + ak)
        self.nonce = encoded(read("nonce"))
        self.quote_text = "r" + ":".join(map(encoded, (read("attest"), read("signature"), pcr_blob(values))))
        self.log = encoded(read("log"))

    def quote(self):
        failure = Tpm().check_quote(None, self.nonce, None, self.quote_text, self.ak, skip_pcr_check=True)
        assert not failure, failure.events
        return 1

    def appraise(self):
        self.quote()
        # By default it accepts any log that can be read, so there is nothing to do after this.
        pcrs, _, _, failure = tpm2_tools_elparser.bootlog_parse(self.log, "sha256")
        assert pcrs and not failure, [event.context for event in failure.events]
        return 1


class List:
    """A measurement list, with a digest in the policy for each path."""

    def __init__(self, folder):
        self.lines = (folder / "list").read_text().splitlines()
        self.pcr = (folder / "pcr10").read_text().strip()
        self.policy = dict(ima.EMPTY_RUNTIME_POLICY, digests={}, ima=dict(ima.EMPTY_RUNTIME_POLICY["ima"]))
        for line in self.lines:
            _, _, _, digest, path = line.split(" ", 4)
            self.policy["digests"].setdefault(path, []).append(digest.split(":")[1])

    def ima(self):
        _, failure = ima.process_measurement_list(None, self.lines, self.policy, self.pcr, hash_alg=Hash.SHA256)
        assert not failure, [event.context for event in failure.events][:3]
        return len(self.lines)


def rate(work):
    started, done = time.perf_counter(), 0
    while True:
        done += work()
        elapsed = time.perf_counter() - started
        if elapsed >= MOMENT:
            return done / elapsed


def main(folder):
    folder = pathlib.Path(folder)
    able = [maker(folder) for maker, needs in ((Boot, "attest"), (List, "list")) if (folder / needs).exists()]
    for line in sys.stdin:
        what = line.strip()
        work = next(getattr(one, what) for one in able if hasattr(one, what))
        print(rate(work), flush=True)


main(*sys.argv[1:])
