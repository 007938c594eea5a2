"""Operations of the Phase 8 block."""
