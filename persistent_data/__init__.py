"""Copy-on-write btrees and reference-counting space maps on the blocks of a metadata device.

It knows nothing of thin devices.  Its modules are imported by name; what other structures build on is
:class:`~persistent_data.block_manager.BlockManager`,
:class:`~persistent_data.transaction_manager.TransactionManager`, the space maps and
:class:`~persistent_data.btree.BTree`.
"""
