"""Is the text, or its distribution, that of plain decoding?"""
