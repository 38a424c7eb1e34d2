"""The peers: each module is a program that runs in a process of its own, as its users write it.

They import nothing of cnnray. What they share is how they are told what to do (``task``).
"""
