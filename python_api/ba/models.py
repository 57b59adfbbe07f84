"""Camera models, by BAL's and COLMAP's names."""

# In the order in which they follow rotation and translation. All but snavely look down +z.
INTRINSICS: dict[str, tuple[str, ...]] = {
    "snavely": ("f", "k1", "k2"),
    "simple_pinhole": ("f", "cx", "cy"),
    "pinhole": ("fx", "fy", "cx", "cy"),
    "simple_radial": ("f", "cx", "cy", "k"),
    "radial": ("f", "cx", "cy", "k1", "k2"),
    "opencv": ("fx", "fy", "cx", "cy", "k1", "k2", "p1", "p2"),
}
