"""How annotations are checked under test: beartype, with int accepted where float is asked for, as type checkers do."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
