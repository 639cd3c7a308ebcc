"""``macft serve``: answers over HTTP in the form of OpenAI's API."""
