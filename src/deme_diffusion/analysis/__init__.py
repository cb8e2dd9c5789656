"""What is learned about models beside their scores: the data of the paper's figures. Arrays out; nothing is drawn."""
