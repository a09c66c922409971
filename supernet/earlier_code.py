"""Code files that earlier versions wrote into packages: those run as well, as far as they were ours."""

EARLIER_CODE = frozenset(
    {
        "0075ed9464fb0b718d348ace067fe1f5efcb04f08eb020e96fc508367e03add1",
        "0b2c8d78160b7dd56cbcc452d367c34f97ed50eb921783c425da5f3dc680730a",
        "3c29934650be63b30796f4793673e80807010190cdc72eb4ee5375fdd9731342",
        "5a2006f9d0644554ef2db08282f3ada51ffff7e56c8c19f8b83fd74e9f1b529d",
        "5e7e0ed722c8e5960d386e177e30dbe10b03e93876c736de731c407e526e04f0",
        "62ff618f87a123f69295ceeb56a7e182e0b0679b0de5308d9bec371c37a3a8f9",
        "8decc20e65ae07714e2f0337d86e29966fb0deeed361145ae5d031afaec66a8d",
        "9f90eee69c53476e92409d27149706ded302b03d001c629b26db85d1fb6a8b47",
        "b4200f00a048e8bcfe00fef1c3f2b495f87d87c91d394ef88c55c9c1738cf51b",
        "ba5a6385239443b6b86ebb80afe7f05804fb929c455ddc0fde147db05045bc23",
        "bf94d7b19e5a7d44a66d3d15e7db930b9442010d93fa8c138e86b4f39c9da243",
        "c04a80a24af484ebc8c7b043919c9d5a17d93b30455f43d52557df2caaa5c76e",
        "cb6b4be051adf1919ee8ae09f59d8e86cd495bbc22b5075dd8c11aae23827739",
        "dc9d0b870d1950a5b518234dba683d819c6f31624a3483fe9e4b38bde26d1d24",
        "e4ea15a971135ecb1f3894d4ccdcd6073901e869f4dc5826c7dfbdd9b857204f",
        "e546b152707b5d997ee1754dfd77172ee985e5b9d221a201e97c3646f634851f",
        "ed2980bfb155c47cbc30f6c99f07a5ee402f88a4aa20868b16ad66eaf074247e",
    }
)
"""SHA-256 of the files. Who changes a template adds what it gave for every family until then."""
