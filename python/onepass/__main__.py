"""`python -m onepass`: the same as the installed `onepass` command."""

from __future__ import annotations

from onepass_tools import main

if __name__ == "__main__":
    raise SystemExit(main())
