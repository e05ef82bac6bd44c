"""`oel report`: one page about a run that needs no network, and its figures as PNGs. Any process; reads files only."""
