Feature: Orders

  Background:
    Given Ann has logged in

  Scenario Outline: An order lowers the stock and is audited
    Given a kettle for 150 cents
    When Ann puts <quantity> of the kettle into the basket
    And Ann orders
    Then the answer is 201
    And the order costs <cents> cents
    And there are <left> of the kettle in stock
    And the audit of Ann says "logged in, ordered"
    And the orders of Ann have "<quantity> x" the kettle

    Examples:
      | quantity | cents | left |
      | 1        | 150   | 9    |
      | 2        | 300   | 8    |
      | 10       | 1500  | 0    |

  Scenario: An order of several products
    Given a kettle for 100 cents
    And a pan for 100 cents
    And a lamp for 100 cents
    When Ann puts into the basket
      | what   | quantity |
      | kettle | 1        |
      | kettle | 2        |
      | pan    | 1        |
      | pan    | 2        |
      | lamp   | 1        |
      | lamp   | 2        |
    And Ann orders
    Then the order costs 900 cents

  # The gift card is nobody's: it stays, and its order lines go with their order.
  Scenario: What everybody buys
    When Ann puts 1 of "gift-card" into the basket
    And Ann orders
    Then the answer is 201

  Scenario: Everybody sees their own orders
    Given Bob has logged in
    And a kettle
    When Ann puts 1 of the kettle into the basket
    And Ann orders
    Then the orders of Ann have the kettle
    And the orders of Bob have no kettle

  Scenario: An empty basket is no order
    When Ann orders
    Then the answer is 400

  Scenario: More than there is cannot be ordered
    Given a kettle, 1 in stock
    When Ann puts 2 of the kettle into the basket
    And Ann orders
    Then the answer is 409
    And there are 1 of the kettle in stock
    And the basket of Ann has the kettle
