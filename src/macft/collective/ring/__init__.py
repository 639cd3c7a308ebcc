"""The ring over ZeroMQ and TCP streams: how it forms, what it sends and expects, and how it ends."""
