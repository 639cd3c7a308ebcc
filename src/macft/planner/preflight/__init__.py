"""Before a run loads its model: the nodes tell what they have, agree on a placement, and each decides its part."""
