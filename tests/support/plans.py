"""Reading what a plan prints."""

import re

UNIT = {"MiB": 2**20, "GiB": 2**30}


def sizes(text):
    return [float(number) * UNIT[unit] for number, unit in re.findall(r"([\d.]+) (MiB|GiB)", text)]
