"""Run one command under an audit hook: the arguments are a file for the report and the command."""

import json
import os
import sys
from pathlib import Path

WATCHED = {
    *("socket.connect", "socket.getaddrinfo", "socket.bind", "subprocess.Popen", "os.system"),
    *("os.exec", "os.fork", "os.posix_spawn", "os.startfile", "pickle.find_class"),
}
OPENS = {"open", "os.listdir", "os.scandir"}


def name_of(args):
    return os.fsdecode(args[0]) if args and isinstance(args[0], str | bytes) else ""


def watch(seen):
    def hook(event, args):
        if event in WATCHED:
            seen["acts"].append([event, repr(args)[:200]])
        elif event in OPENS:
            seen["opens"].append(name_of(args))
        elif event == "exec":
            seen["code"].append(args[0].co_filename)
        elif event == "import":
            seen["imports"].append(args[0])

    sys.addaudithook(hook)


def run(arguments):
    from cli.main import main

    try:
        return main(arguments)
    except SystemExit as error:
        return error.code


if __name__ == "__main__":
    report = Path(sys.argv[1])
    seen = {"acts": [], "opens": [], "code": [], "imports": []}
    sys.path[0] = str(Path(__file__).parents[2])
    watch(seen)
    code = run(sys.argv[2:])
    told = json.dumps({**seen, "modules": sorted(sys.modules)})
    report.write_text(told)
    sys.exit(code)
