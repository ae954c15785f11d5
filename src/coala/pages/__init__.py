"""What all pages share: one skeleton, one style sheet, the parts a page is put together from, figures, worded numbers.

    parts    elements, tables, sections and whole pages; every text that is not markup already is escaped
    drawing  figures as inline SVG (matplotlib, imported when one is drawn)
    words    estimates, seconds, FLOPs and bytes as people say them
    page.html, page.css

Knows nothing of what is shown. A page fetches nothing, runs no script, and is the same bytes for the same content.
"""
