"""`specdec bench report`: one page, Markdown and plots."""
