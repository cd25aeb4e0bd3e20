"""HTTP in, HTTP out: the only room that knows status codes. Wire shapes stay in here; requests leave as dataclasses."""
