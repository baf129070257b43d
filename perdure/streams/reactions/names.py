"""The names in the Suzuki-Miyaura spreadsheet as SMILES, and the reaction SMILES that they make.

Data file S1 of Perera et al., "A platform for automated nanomole-scale reaction screening and micromole-scale
synthesis in flow", Science 359, 429 (2018): `aap9112_Data_File_S1.xlsx`, 5,760 rows. It names compounds; the SMILES
are canonical, with salts, hydrates and by-standers as they were dosed: every solvent is aqueous, and the four
quinoline electrophiles stand with 1,3-diethylbenzene.
"""

from __future__ import annotations

from collections.abc import Mapping

# Column of the spreadsheet: name of the field, as the joined CSV has it.
PUBLISHED_COLUMNS = {
    "Reactant_1_Name": "reactant_1",
    "Reactant_1_Short_Hand": "reactant_1_short",
    "Reactant_2_Name": "reactant_2",
    "Catalyst_1_Short_Hand": "catalyst",
    "Ligand_Short_Hand": "ligand",
    "Reagent_1_Short_Hand": "base",
    "Solvent_1_Short_Hand": "solvent",
}
PUBLISHED_KEY = "Reaction_No"
PUBLISHED_YIELD = "Product_Yield_PCT_Area_UV"
ABSENT = "None"  # how the table writes that a well had no ligand or no base

_QUINOLINE = ".CCc1cccc(CC)c1"
SMILES: Mapping[str, Mapping[str, str]] = {
    "reactant_1": {
        "6-chloroquinoline": "Clc1ccc2ncccc2c1" + _QUINOLINE,
        "6-Bromoquinoline": "Brc1ccc2ncccc2c1" + _QUINOLINE,
        "6-triflatequinoline": "O=S(=O)(Oc1ccc2ncccc2c1)C(F)(F)F" + _QUINOLINE,
        "6-Iodoquinoline": "Ic1ccc2ncccc2c1" + _QUINOLINE,
        "6-quinoline-boronic acid hydrochloride": "OB(O)c1ccc2ncccc2c1.Cl.O",
        "Potassium quinoline-6-trifluoroborate": "F[B-](F)(F)c1ccc2ncccc2c1.[K+].O",
        "6-Quinolineboronic acid pinacol ester": "CC1(C)OB(c2ccc3ncccc3c2)OC1(C)C.O",
    },
    "reactant_2": {
        "2a, Boronic Acid": "Cc1ccc2c(cnn2C2CCCCO2)c1B(O)O",
        "2b, Boronic Ester": "Cc1ccc2c(cnn2C2CCCCO2)c1B1OC(C)(C)C(C)(C)O1",
        "2c, Trifluoroborate": "Cc1ccc2c(cnn2C2CCCCO2)c1[B-](F)(F)F.[K+]",
        "2d, Bromide": "Cc1ccc2c(cnn2C2CCCCO2)c1Br",
    },
    "catalyst": {"Pd(OAc)2": "CC(=O)O~CC(=O)O~[Pd]"},
    "ligand": {
        "P(tBu)3": "CC(C)(C)P(C(C)(C)C)C(C)(C)C",
        "P(Ph)3": "c1ccc(P(c2ccccc2)c2ccccc2)cc1",
        "AmPhos": "CN(C)c1ccc(P(C(C)(C)C)C(C)(C)C)cc1",
        "P(Cy)3": "C1CCC(P(C2CCCCC2)C2CCCCC2)CC1",
        "P(o-Tol)3": "Cc1ccccc1P(c1ccccc1C)c1ccccc1C",
        "CataCXium A": "CCCCP(C12CC3CC(CC(C3)C1)C2)C12CC3CC(CC(C3)C1)C2",
        "SPhos": "COc1cccc(OC)c1-c1ccccc1P(C1CCCCC1)C1CCCCC1",
        "dtbpf": "CC(C)(C)P(C1=CC=C[CH]1)C(C)(C)C.CC(C)(C)P(C1=CC=C[CH]1)C(C)(C)C.[Fe]",
        "XPhos": "CC(C)c1cc(C(C)C)c(-c2ccccc2P(C2CCCCC2)C2CCCCC2)c(C(C)C)c1",
        "dppf": "c1ccc(P(c2ccccc2)[c-]2cccc2)cc1.c1ccc(P(c2ccccc2)[c-]2cccc2)cc1.[Fe+2]",
        "Xantphos": "CC1(C)c2cccc(P(c3ccccc3)c3ccccc3)c2Oc2c(P(c3ccccc3)c3ccccc3)cccc21",
        ABSENT: "",
    },
    "base": {
        "NaOH": "[Na+].[OH-]",
        "NaHCO3": "O=C([O-])O.[Na+]",
        "CsF": "[Cs+].[F-]",
        "K3PO4": "O=P([O-])([O-])[O-].[K+].[K+].[K+]",
        "KOH": "[K+].[OH-]",
        "LiOtBu": "CC(C)(C)[O-].[Li+]",
        "Et3N": "CCN(CC)CC",
        ABSENT: "",
    },
    "solvent": {
        "MeCN": "CC#N.O",
        "THF": "C1CCOC1.O",
        "DMF": "CN(C)C=O.O",
        "MeOH": "CO.O",
        "MeOH/H2O_V2 9:1": "CO.O",
        "THF_V2": "C1CCOC1.O",
    },
}
PRODUCT = "Cc1ccc2c(cnn2C2CCCCO2)c1-c1ccc2ncccc2c1"  # every pair couples to the same biaryl
REQUIRED_COLUMNS = tuple(column for column, name in PUBLISHED_COLUMNS.items() if name in SMILES)


def cleaned(name: str, cell: str) -> str:
    """A cell of the spreadsheet as the tables have it: no spaces about it, no ligand or base written as None."""
    cell = cell.strip()
    return ABSENT if not cell and ABSENT in SMILES.get(name, {}) else cell


def published_smiles(fields: Mapping[str, str]) -> str:
    """The reaction SMILES of a row of the spreadsheet: all fragments before the arrow, sorted as text.

    Args:
        fields: reactant_1, reactant_2, catalyst, ligand, base and solvent, cleaned.

    Raises:
        KeyError: a name that the tables do not have.
    """
    compounds = [table[fields[name]] for name, table in SMILES.items()]
    return ".".join(sorted(".".join(filter(None, compounds)).split("."))) + f">>{PRODUCT}"
