"""``python -m prunelab`` is the ``prunelab`` command."""

from prunelab.cli import main

raise SystemExit(main())
