"""A long mixed load with faults, and the balance sheet that has to come out even.

``traffic`` draws requests, ``verdict`` judges what came back, ``trouble`` kills and unloads, ``watch`` reads the
server's process, ``sheet`` adds up, ``run`` puts them together.
"""
