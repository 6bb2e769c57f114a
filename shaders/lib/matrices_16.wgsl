// Cooperative matrices of 16 x 16, operands f16 and sums f32: tensor cores and WMMA, as Vulkan drivers report them. Weights of other types do
// not fit: f16 has fewer bits than f32 and fewer exponents than bf16.

alias Operand = f16;
alias Left = coop_mat16x16<f16, A>;
alias Right = coop_mat16x16<f16, B>;
alias Sums = coop_mat16x16<f32, C>;
const SIDE = 16u;
