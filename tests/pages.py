"""What the tests of pages share: HTML, read."""
from html.parser import HTMLParser


class Page(HTMLParser):
    """Checks that every tag is closed in order; keeps the tags, the texts and the attributes."""

    def __init__(self, text):
        super().__init__()
        self.open = []
        self.tags = []
        self.texts = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def of_class(self, name):
        return [attributes for _, attributes in self.tags if attributes.get("class") == name]
