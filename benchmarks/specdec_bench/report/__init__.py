"""`specdec bench report`: one page, and Markdown."""
