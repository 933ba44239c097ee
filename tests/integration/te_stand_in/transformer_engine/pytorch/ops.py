"""Names of TE's op fuser, which older releases of megatron.core have in annotations."""


class FusibleOperation:
    pass


class Sequential:
    pass
