"""`bmtk clean`: from raw text to a corpus worth training on, by a datatrove pipeline that one YAML file describes.

    arguments -> rules -> stages -> executors -> command

A stage is a datatrove pipeline over the shards of a corpus.  How many shards there are is decided by the input alone,
so that neither the executor nor the number of workers changes a byte of the result.  Without datatrove (the extra
`clean`) only `arguments` and `command` can be imported.
"""
