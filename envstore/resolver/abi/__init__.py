"""Will the programs and libraries of an environment find each other? Answered without a loader.

``facts`` says what one ELF file wants and offers, ``check`` compares what all of them say,
``host`` knows what every machine promises.
"""
