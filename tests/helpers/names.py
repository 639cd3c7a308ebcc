"""Names that a folder may have, and that commands get wrong."""

NASTY = 'Ben\'s [x] a=b, "q" ${name} $HOME 100% é👩‍💻;*?{a: 1} #\\'
