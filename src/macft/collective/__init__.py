"""Operations that all ranks of a run carry out together: summing, sharing, gathering; and messages between two."""
