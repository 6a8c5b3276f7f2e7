"""Attention over paged KV: one interface (:class:`server.worker.batch.AttentionBackend`), several ways.

``reference`` is plain and obviously right, ``grouped`` computes a shared prefix once in torch calls
that run anywhere, ``cuda`` does the same with the paged kernel of ``torch.nn.attention.varlen``, and
``server.worker.native`` has one in C++.
"""
