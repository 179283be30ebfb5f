"""A process that speaks to the loopback Hub with the real client, told what to do line by line.

`huggingface_hub` reads its endpoint once, when it is imported, and the tests themselves run
offline; so the client lives in a process of its own. Each line on stdin is a JSON object with
`code` and `values`; the answer is one with `found` (what the code bound to that name), `out` and
`error`.
"""

import contextlib
import io
import json
import sys
import traceback


def main() -> None:
    answers, scope = sys.stdout, {}
    for line in sys.stdin:
        asked = json.loads(line)
        scope |= {"found": None, **asked["values"]}  # names stay from line to line
        printed, error = io.StringIO(), None
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            try:
                exec(asked["code"], scope)
            except Exception as raised:
                traceback.print_exc()
                error = f"{type(raised).__name__}: {raised}"
        answer = {"found": scope["found"], "out": printed.getvalue(), "error": error}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


main()
